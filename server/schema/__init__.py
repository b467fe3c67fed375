"""Wire types: what arrives and what leaves, as JSON."""
