"""The platform's services: each a package with its wire edge, its domain and its schema, independent of the others."""
