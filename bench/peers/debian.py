"""HAProxy and nginx, as Debian packages them: one thread or worker, keep-alive to the upstream."""

import re
import shutil
import subprocess

from bench.machine import free_port
from bench.peers.base import Absent, Running, Site, serve

HAPROXY_CONFIG = """\
global
  nbthread {threads}
  maxconn 8000
  {log}
defaults
  mode http
  timeout connect 5s
  timeout client 120s
  timeout server 120s
  http-reuse always
  {log_format}
frontend clients
  bind 127.0.0.1:{port}
  bind 127.0.0.1:{tls_port} ssl crt {tls}
  default_backend engines
backend engines
  server mock 127.0.0.1:{mock_port} pool-max-conn -1
"""
NGINX_CONFIG = """\
daemon off;
worker_processes {workers};
worker_rlimit_nofile 16384;
pid {folder}/nginx.pid;
error_log {folder}/nginx.err error;
events {{ worker_connections 8192; }}
http {{
  access_log {folder}/nginx.access combined buffer=64k flush=1s;
  client_body_temp_path {folder}/nginx.body;
  proxy_temp_path {folder}/nginx.temp;
  fastcgi_temp_path {folder}/nginx.temp; uwsgi_temp_path {folder}/nginx.temp; scgi_temp_path {folder}/nginx.temp;
  keepalive_requests 100000000;
  tcp_nodelay on;
  upstream engines {{ server 127.0.0.1:{mock_port}; keepalive 2048; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    listen 127.0.0.1:{tls_port} ssl;
    ssl_certificate {tls}; ssl_certificate_key {tls};
    location / {{
      proxy_pass http://engines;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 120s;
    }}
  }}
}}
"""


def _program(name: str) -> str:
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if path is None:
        raise Absent(f"{name} is not installed: apt-get install haproxy nginx")
    return path


def _version(name: str, flag: str) -> str:
    said = subprocess.run([_program(name), flag], capture_output=True, text=True, check=True)
    found = re.search(r"(\d+\.\d+\.\d+)", said.stdout + said.stderr)
    return found.group(1) if found else "?"


class Haproxy:
    """The reference. It has no log by default: then it does least, so ratios to it are strict."""

    slow = False
    exact = True

    def __init__(self, log: bool) -> None:
        self.log = log
        self.name = "haproxy-log" if log else "haproxy"
        self.about = "access log to a file (httplog)" if log else "no access log"

    def version(self) -> str:
        """Its version, from its own `-v`."""
        return _version("haproxy", "-v")

    def start(self, site: Site) -> Running:
        """Start it with one thread for each requested worker."""
        port, tls_port = free_port(), free_port()
        config = site.folder / f"{self.name}.cfg"
        config.write_text(
            HAPROXY_CONFIG.format(
                threads=site.workers,
                # Standard output is a file here; through syslog it costs one send a request instead of one write.
                log="log stdout format raw local0 info" if self.log else "",
                log_format="log global\n  option httplog" if self.log else "",
                port=port,
                tls_port=tls_port,
                tls=site.tls,
                mock_port=site.mock_port,
            )
        )
        running = serve([_program("haproxy"), "-db", "-f", str(config)], site, self.name, port)
        running.tls_port = tls_port
        return running


class Nginx:
    """nginx with a buffered access log, unbuffered answers (buffered events would wait) and many kept connections."""

    name = "nginx"
    slow = False
    exact = True
    about = "access log to a file (buffered), answers not buffered"

    def version(self) -> str:
        """Its version, from its own `-v`."""
        return _version("nginx", "-v")

    def start(self, site: Site) -> Running:
        """Start it with the requested workers."""
        port, tls_port = free_port(), free_port()
        config = site.folder / "nginx.conf"
        names = {"folder": site.folder, "mock_port": site.mock_port, "tls": site.tls}
        config.write_text(NGINX_CONFIG.format(workers=site.workers, port=port, tls_port=tls_port, **names))
        argv = [_program("nginx"), "-p", str(site.folder), "-e", str(site.folder / "nginx.err"), "-c", str(config)]
        running = serve(argv, site, self.name, port)
        running.tls_port = tls_port
        return running
