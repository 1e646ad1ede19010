"""What all conversions share: rows, slices that fit into memory, tasks for several processes."""
