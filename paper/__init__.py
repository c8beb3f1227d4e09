"""The paper's tables and figures: specs as data, the runner, the report."""
