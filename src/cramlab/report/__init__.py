"""Reports: records in, tables, figures and one page out. The only place that imports matplotlib."""
