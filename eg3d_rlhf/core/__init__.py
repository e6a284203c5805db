"""What everybody uses: flags, registry, plugins, settings, seeds, statistics, Field, grids."""
