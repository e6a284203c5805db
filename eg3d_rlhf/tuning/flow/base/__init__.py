"""Interfaces and data of multi-stage flow generators, which training, families and workspace use."""
