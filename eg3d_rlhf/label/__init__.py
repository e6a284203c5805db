"""The pairwise labelling application: pairs, prepared shapes, store, web server and page."""
