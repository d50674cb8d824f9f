"""gRPC: the secure endpoint, and on it the control plane, outside workers and the adaptation service; the only importer of grpc."""
