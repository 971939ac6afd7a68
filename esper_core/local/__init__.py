"""The laptop stack: the real NATS, PostgreSQL and S3 servers and the services, started and supervised on one machine.

``stack`` is the way in (``up``, ``down``, ``status``, ``endpoints``); everything else is its inside. Nothing here needs
a network, a container or a privilege, and nothing listens beyond loopback and unix sockets but the services
themselves, which demand mutual TLS.
"""
