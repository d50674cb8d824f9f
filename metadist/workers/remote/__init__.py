"""Workers that join over gRPC."""

import metadist.rpc  # noqa: F401  (sets gRPC's environment variables before grpc is imported)
