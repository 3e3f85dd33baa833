"""What a model needs and costs, before anything runs."""
