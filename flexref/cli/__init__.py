"""What `python -m flexref` can do: demo, doctor, show. Imported only from the command line."""
