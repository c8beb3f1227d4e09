"""Run many jobs: an executor maps a function over jobs and yields each result as it comes."""
