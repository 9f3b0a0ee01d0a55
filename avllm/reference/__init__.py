"""Describe settings, fields of rows and options of parts from the code that reads them."""
