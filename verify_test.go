package opampgateway

// asked has the server be asked about agents, and nothing else be tried.
func asked(cfg *Config) { cfg.Server.AgentAdmission = AdmissionAsk }
