//! HTTP/1.1: one GET request for a connection.

use std::io::{self, Read, Write};

/// Largest request head, in bytes.
const MAX_HEAD: usize = 8 << 10;

/// Largest number of header fields.
const MAX_HEADERS: usize = 64;

/// Media type of OpenMetrics 1.0.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Media type of Prometheus' own text form.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Form of the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus' text form 0.0.4.
    Text,
}

/// The page that a request names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// `/`.
    Index,
    /// `/metrics`, in this form.
    Metrics(Format),
}

/// A reply.
#[derive(Debug)]
pub struct Response {
    status: &'static str,
    media_type: &'static str,
    body: String,
}

impl Response {
    /// Creates a reply with a line of text.
    pub fn text(body: &str) -> Response {
        Response { status: "200 OK", media_type: TEXT, body: body.to_owned() }
    }

    /// Creates a reply with metrics.
    pub fn metrics(format: Format, body: String) -> Response {
        let media_type = match format {
            Format::OpenMetrics => OPEN_METRICS,
            Format::Text => TEXT,
        };
        Response { status: "200 OK", media_type, body }
    }

    /// Creates the reply to a request that failed in the exporter.
    pub fn failed(error: &str) -> Response {
        Response { status: "500 Internal Server Error", ..Response::text(&format!("{error}\n")) }
    }

    fn refused(status: &'static str) -> Response {
        Response { status, ..Response::text(&format!("{status}\n")) }
    }

    /// Writes the reply.
    ///
    /// # Errors
    /// Returns an error if writing fails.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let allow = if self.status.starts_with("405") { "Allow: GET\r\n" } else { "" };
        let head = format!(
            "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\n{allow}Connection: close\r\n\r\n",
            self.status,
            self.media_type,
            self.body.len()
        );
        out.write_all(head.as_bytes())?;
        out.write_all(self.body.as_bytes())?;
        out.flush()
    }
}

/// Reads one request head. Returns the page that the request names, or the reply that refuses the request.
///
/// # Errors
/// Returns an error if the connection ends before, or if reading fails.
pub fn read(connection: &mut impl Read) -> io::Result<Result<Page, Response>> {
    let mut head = [0; MAX_HEAD];
    let mut length = 0;
    loop {
        let read = match connection.read(&mut head[length..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        length += read;
        match page(&head[..length]) {
            Ok(Some(page)) => return Ok(Ok(page)),
            Ok(None) if length < MAX_HEAD => {}
            Ok(None) => return Ok(Err(Response::refused("431 Request Header Fields Too Large"))),
            Err(status) => return Ok(Err(Response::refused(status))),
        }
    }
}

/// Returns the page that a request head names, `None` if the head is incomplete, and a status for other requests.
fn page(head: &[u8]) -> Result<Option<Page>, &'static str> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err("431 Request Header Fields Too Large"),
        Err(_) => return Err("400 Bad Request"),
    }
    if request.method != Some("GET") {
        return Err("405 Method Not Allowed");
    }
    let accept = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("accept"));
    let accept: Vec<_> = accept.map(|header| String::from_utf8_lossy(header.value)).collect();
    match request.path.unwrap_or_default().split('?').next() {
        Some("/metrics") => Ok(Some(Page::Metrics(format(&accept.join(","))))),
        Some("/") => Ok(Some(Page::Index)),
        _ => Err("404 Not Found"),
    }
}

/// Chooses the form by an Accept header (RFC 9110, 12.5.1): OpenMetrics if the client accepts it by name, and prefers no
/// plain text.
fn format(accept: &str) -> Format {
    let quality = |wanted: &str| {
        let of_range = |range: &str| {
            let mut parts = range.split(';').map(str::trim);
            if !parts.next()?.eq_ignore_ascii_case(wanted) {
                return None;
            }
            let mut quality = 1.0;
            for (key, value) in parts.filter_map(|part| part.split_once('=')) {
                let value = value.trim_matches('"');
                match key.trim().to_ascii_lowercase().as_str() {
                    "q" => quality = value.parse().unwrap_or(0.0),
                    "version" if !["1.0.0", "0.0.1", "0.0.4"].contains(&value) => return None,
                    _ => {}
                }
            }
            Some(quality)
        };
        accept.split(',').filter_map(of_range).fold(0.0, f32::max)
    };
    let open = quality("application/openmetrics-text");
    match open > 0.0 && open >= quality("text/plain") {
        true => Format::OpenMetrics,
        false => Format::Text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accept_header_selects_the_form() {
        let prometheus = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                          text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        for accept in [
            prometheus,
            "Application/OpenMetrics-Text; version=\"1.0.0\"; q=0.3",
            "text/plain;q=0.2, application/openmetrics-text;q=0.2",
        ] {
            assert_eq!(format(accept), Format::OpenMetrics, "{accept}");
        }
        for accept in [
            "",
            "*/*",
            "text/plain",
            "application/openmetrics-text;version=2.0.0",
            "application/openmetrics-text;q=0",
            "application/openmetrics-text;q=x",
            "application/openmetrics-text;q=0.4,text/plain;q=0.5",
        ] {
            assert_eq!(format(accept), Format::Text, "{accept}");
        }
    }

    /// Sends a request, in pieces of one byte if `slow`.
    fn ask(request: &[u8], slow: bool) -> (String, Option<Page>) {
        struct Peer<'a>(&'a [u8], bool);
        impl Read for Peer<'_> {
            fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
                let most = if self.1 { 1 } else { out.len() };
                let length = most.min(self.0.len()).min(out.len());
                out[..length].copy_from_slice(&self.0[..length]);
                self.0 = &self.0[length..];
                Ok(length)
            }
        }
        let mut reply = Vec::new();
        let asked = read(&mut Peer(request, slow)).ok();
        let page = asked.as_ref().and_then(|asked| asked.as_ref().ok().copied());
        if let Some(asked) = asked {
            let response = asked.map_or_else(|refusal| refusal, |_| Response::text("body\n"));
            response.write(&mut reply).unwrap();
        }
        let reply = String::from_utf8(reply).unwrap();
        (reply.lines().next().unwrap_or_default().to_owned(), page)
    }

    #[test]
    fn only_gets_of_two_pages_are_answered() {
        for slow in [false, true] {
            let metrics = Some(Page::Metrics(Format::Text));
            let (ok, missing) = ("HTTP/1.1 200 OK", "HTTP/1.1 404 Not Found");
            for (request, status, page) in [
                ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", ok, metrics),
                ("GET /metrics?a=b HTTP/1.0\r\n\r\n", ok, metrics),
                ("GET / HTTP/1.1\r\n\r\n", ok, Some(Page::Index)),
                ("GET /metrics/ HTTP/1.1\r\n\r\n", missing, None),
                ("GET /../etc/passwd HTTP/1.1\r\n\r\n", missing, None),
                (
                    "POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
                    "HTTP/1.1 405 Method Not Allowed",
                    None,
                ),
                ("HEAD / HTTP/1.1\r\n\r\n", "HTTP/1.1 405 Method Not Allowed", None),
                ("nonsense\r\n\r\n", "HTTP/1.1 400 Bad Request", None),
                ("GET /metrics HTTP/1.1\r\n", "", None),
                ("", "", None),
            ] {
                assert_eq!(ask(request.as_bytes(), slow), (status.to_owned(), page), "{request}");
            }
        }
    }

    #[test]
    fn a_request_without_end_is_refused() {
        let large = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(2 * MAX_HEAD));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "X: x\r\n".repeat(MAX_HEADERS + 1));
        for request in [large, many] {
            assert_eq!(ask(request.as_bytes(), false).0, "HTTP/1.1 431 Request Header Fields Too Large");
        }
    }
}
