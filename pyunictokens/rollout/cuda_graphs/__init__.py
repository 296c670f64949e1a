"""Image steps without the host: captured steps, and slots that run them."""
