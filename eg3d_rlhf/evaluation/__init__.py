"""What a comparison of generators shows: each module makes jobs of a report from one Comparison."""
