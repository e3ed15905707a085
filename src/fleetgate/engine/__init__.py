"""`fleetgate engine`: a simulated inference server, or a real llama.cpp server, behind the OpenAI protocol."""
