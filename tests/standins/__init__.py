"""Small models with the attribute and parameter names of public code, for tests of `arimg.accelerate`."""
