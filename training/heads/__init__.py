"""A procedural family of heads: an implicit surface with about forty parameters, and its renderer."""
