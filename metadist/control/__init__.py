"""gRPC: the secure endpoint, and on it the control plane, outside workers and the adaptation service; the only importer of grpc."""

import os

# Read when grpc is imported. Children are started by exec here, for which gRPC need not stop its threads; and a stranger's
# failed handshake is no news for stderr.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
