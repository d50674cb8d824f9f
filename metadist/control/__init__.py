"""Control of a run while it trains: commands, their log, status, a gRPC service and its client."""

import metadist.rpc  # noqa: F401  (sets gRPC's environment variables before grpc is imported)
