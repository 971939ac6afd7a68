"""``esperctl``: the command line, one file per noun.

Imports neither torch nor services, and grpc only when it dials.
"""
