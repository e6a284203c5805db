"""What is measured of a generator or an asset; knows no reward."""
