package main

import "errors"

func (b *bench) target(string, string, int) error { return errors.New("soon") }
