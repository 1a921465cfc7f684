"""The report's views: one HTML page, its pictures, and what each says. Imports `run`."""
