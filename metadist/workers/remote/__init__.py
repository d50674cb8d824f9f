"""Workers that join over gRPC."""
