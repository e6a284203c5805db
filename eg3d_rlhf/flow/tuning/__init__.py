"""Preference training of one stage of a flow-based generator: settings, update, progress, failure signs, resume."""
