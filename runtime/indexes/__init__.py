"""Indexes: what finds, for a query, the keys of a long past that matter to it."""
