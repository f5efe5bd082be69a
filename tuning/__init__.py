"""The searches: what is tried, how it is scheduled, what came out."""
