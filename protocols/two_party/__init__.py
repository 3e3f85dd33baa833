"""The protocols between keeper and user, one file for each."""
