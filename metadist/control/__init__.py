"""The gRPC control plane, outside workers and the adaptation service will live here; the only importer of grpc."""
