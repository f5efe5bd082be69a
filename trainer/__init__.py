"""Stage one, features, heads, evaluation, report, and the model in a user's hands."""
