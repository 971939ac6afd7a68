"""gRPC at the edges: one way to serve, one way to dial, and who may call what.

contract    what the protos say of every method        policy   who may call it
convert     domain nouns <-> messages                  auth     who is calling
status      our errors <-> gRPC statuses               tls      the certificates both sides need
layers      what every served call passes through      server   listen
client      dial
"""
