"""gRPC and HTTP endpoints with size limits, time-outs, TLS and tokens.

gRPC reads the two environment variables below when it is imported. Every package that imports grpc therefore imports
this package first, in its ``__init__``.
"""

import os

# metadist starts its children by exec, so gRPC need not stop its threads around a fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# gRPC's INFO messages on stderr include every failed handshake of a stranger.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
