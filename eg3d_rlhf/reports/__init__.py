"""Pictures and pages from recorded results."""
