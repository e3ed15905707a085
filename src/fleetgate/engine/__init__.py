"""`fleetgate engine`: a simulated inference server, or a real llama.cpp server, with the OpenAI protocol."""
