package main

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// An agent over plain HTTP keeps its connection open, and sends each message as the body of a POST on it. Everything
// else about it is as with a WebSocket: see conn.posts.

// writePost writes one message as a request, or a response, by one call of the socket.
func (c *conn) writePost(message []byte) error {
	buffer := writeBuffers.Get().(*[]byte)
	defer writeBuffers.Put(buffer)
	message = body(message)
	*buffer = append((*buffer)[:0], c.posts...)
	*buffer = strconv.AppendInt(*buffer, int64(len(message)), 10)
	*buffer = append(*buffer, "\r\n\r\n"...)
	*buffer = append(*buffer, message...)
	c.writing.Lock()
	defer c.writing.Unlock()
	_, err := c.Write(*buffer)
	return err
}

// readPost returns the body of the next request, or of the next response, which is valid until the next call.
func (c *conn) readPost() ([]byte, error) {
	head, err := c.readHead()
	if err != nil {
		return nil, err
	}
	return c.readBody(head)
}

// readBody returns the body behind a head, which is valid until the next call.
func (c *conn) readBody(head string) ([]byte, error) {
	first, rest, _ := strings.Cut(head, "\r\n")
	if c.client && !strings.HasPrefix(first, "HTTP/1.1 200 ") {
		return nil, fmt.Errorf("answered %q", first)
	}
	for line := range strings.SplitSeq(rest, "\r\n") {
		name, value, _ := strings.Cut(line, ":")
		if !strings.EqualFold(name, "Content-Length") {
			continue
		}
		size, err := strconv.Atoi(strings.TrimSpace(value))
		if err != nil || size < 0 || size > 1<<28 {
			return nil, fmt.Errorf("a body of %q bytes", value)
		}
		return c.take(size)
	}
	return nil, fmt.Errorf("%q without a length of its body", first)
}

// beginPosts is the head of an agent's posts, but for the length of the body.
func (a *agent) beginPosts(path string) {
	a.conn.posts = []byte("POST " + path + " HTTP/1.1\r\nHost: " + a.load.url.Host + "\r\n" + a.headers() +
		"Content-Type: application/x-protobuf\r\nContent-Length: ")
}

// postAnswer is the same of the server's answers.
const postAnswer = "HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: "

// servePosts answers posts until the connection ends; head is that of the first.
func (s *server) servePosts(c *serverConn, head string) {
	c.posts = []byte(postAnswer)
	var out []byte
	for message, err := c.readBody(head); err == nil; message, err = c.readPost() {
		if out = s.answer(c, message, out[:0]); c.writePost(out) != nil {
			return
		}
	}
}

// isPost reports whether a request is one of an agent over plain HTTP.
func isPost(head string) bool { return strings.HasPrefix(head, http.MethodPost+" ") }
