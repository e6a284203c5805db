"""Preference training of one stage of a flow-based generator: settings, update, folder, failure signs, resume."""
