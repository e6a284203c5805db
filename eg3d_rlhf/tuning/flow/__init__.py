"""Preference tuning of multi-stage flow generators: DPO on pairs, single labels, and online losses."""
