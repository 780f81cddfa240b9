"""Reports: tables, plots and one HTML page from finished runs."""
