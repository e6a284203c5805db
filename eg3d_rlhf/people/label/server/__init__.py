"""Web server of the labelling application: checks of requests, pages and the API."""
