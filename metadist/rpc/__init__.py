"""gRPC and HTTP endpoints with size limits, time-outs, TLS and tokens."""
