"""The configuration groups of sslcli, shipped as `sslcli.conf`."""
