"""Reports: figures of arrays, and one page that holds them."""
