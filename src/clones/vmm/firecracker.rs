//! The request body of Firecracker's `PUT /snapshot/load`.

use serde_json::json;

use super::paste::VmmArguments;
use super::served::Served;
use crate::error::{Error, Result};
use crate::store::FirecrackerState;

pub(super) fn paste(template: &Served) -> Result<VmmArguments> {
    let memory = template.one_ram("Firecracker loads only one memory file")?;
    let (Some(state), Some(head)) = (template.state(), &template.state_head) else {
        return Err(Error::usage(format!(
            "template {} has no state of Firecracker: neither a file 'state' nor a blob with its header",
            template.name
        ))
        .hint(
            "import the snapshot with its state: stencil import MEMORY NAME --state STATE --format firecracker",
        ));
    };
    let header = FirecrackerState::header(head).map_err(|why| {
        Error::usage(format!("the state of template {} {why}", template.name))
            .at(state)
            .hint("choose a template that was imported with --format firecracker")
    })?;
    let body = json!({
        "snapshot_path": state,
        "mem_backend": {"backend_type": "File", "backend_path": memory.path},
        "resume_vm": true,
    });
    let text = serde_json::to_string_pretty(&body).unwrap_or_default();
    let notes = vec![
        format!(
            "snapshot version {} for {}; load it before any other configuration: curl --unix-socket SOCKET -X PUT \
             http://localhost/snapshot/load -H 'Content-Type: application/json' -d @BODY",
            header.version, header.machine
        ),
        "Firecracker opens the disks, tap devices and vsock socket that the snapshot names; to run several guests of one \
         snapshot, set network_overrides and vsock_override in this body, and give each guest its own copy of every \
         writable disk at that path, for example in a jail"
            .to_owned(),
        "Firecracker cannot load the snapshot of a guest with huge_pages \"2M\" from a file".to_owned(),
    ];
    Ok(VmmArguments { text, body: Some(body), notes, ..VmmArguments::default() })
}

#[cfg(test)]
mod tests {
    use super::super::tests::served;
    use super::*;
    use crate::store::FileKind::{Blob, Ram};

    #[test]
    fn requires_a_firecracker_state() {
        let mut template = served(&[("memory", Ram, 64), ("state", Blob, 1)]);
        template.state_head = Some(b"\0\0\0\x64\x86\x84\x19\x10\x07\x068.0.0".to_vec());
        assert!(paste(&template).unwrap_err().to_string().contains("no readable version"));
        template.state_head = Some(b"\0\0\0\x64\x86\x84\x19\x10\x07\x058.0.0".to_vec());
        let text = paste(&template).unwrap().text;
        let body: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(body["mem_backend"]["backend_path"], "/mnt/by-id/abc/memory");
        template.state_head = Some(b"QEVM\0\0\0\x03".to_vec());
        assert!(paste(&template).unwrap_err().to_string().contains("not written by Firecracker"));
        let several = served(&[("memory", Ram, 64), ("memory-b", Ram, 64), ("state", Blob, 1)]);
        assert!(paste(&several).unwrap_err().to_string().contains("2 RAM files"));
        assert!(
            paste(&served(&[("memory", Ram, 64)]))
                .unwrap_err()
                .to_string()
                .contains("neither a file 'state' nor")
        );
    }
}
