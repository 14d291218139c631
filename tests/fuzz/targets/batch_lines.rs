//! A batch's input: the first byte says in which pieces it comes.
#![no_main]

use eremois::jobs::batch::lines::{Rules, Scanner, parse};

const ENDPOINT: &str = "/v1/embeddings";

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((&piece, text)) = bytes.split_first() else { return };
    let mut scanner = Scanner::new(Rules { endpoint: ENDPOINT.into(), max_requests: 20, max_line_bytes: 500 });
    for piece in text.chunks(usize::from(piece).max(1)) {
        if !scanner.push(piece) {
            break;
        }
    }
    if let Ok(spans) = scanner.finish() {
        assert!(!spans.is_empty() && spans.len() <= 20);
        for span in spans {
            let line = &text[span.start as usize..span.end as usize];
            assert!(parse(line, ENDPOINT).is_ok(), "a line that was accepted is read again when its request is sent");
        }
    }
});
