"""The services' messages: one .proto file a package, and beside it what `make protos` generates from it."""
