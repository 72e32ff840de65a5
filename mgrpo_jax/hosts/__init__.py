"""A job of several processes, one a host: process 0 decides, all compute."""
