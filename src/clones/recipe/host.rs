//! The host files behind a VM's disks, as QMP reports them.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::Result;

/// A medium that is inserted in the VM now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveDisk {
    /// Name of the block backend: the id of `-drive`; empty with `-blockdev`.
    pub device: String,
    /// QOM path or id of the guest device.
    pub qdev: String,
    /// Name of the topmost block node.
    pub node: String,
    /// True if the guest cannot write to the medium.
    pub read_only: bool,
    /// The image with its backing chain.
    pub image: Image,
    /// Reason why the medium is unsupported for clones.
    pub problem: Option<String>,
}

/// One image of a backing chain, as QEMU has opened it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Path of the image, as QEMU sees it.
    pub path: PathBuf,
    /// `qcow2`, `raw`…
    pub format: String,
    /// Size that the guest sees, in bytes.
    pub size: u64,
    /// The backing image, which unallocated blocks are read from.
    pub backing: Option<Box<Image>>,
}

impl LiveDisk {
    /// Parses the reply to `query-block`.
    pub fn from_query_block(reply: &Value) -> Vec<LiveDisk> {
        let text = |v: &Value, key: &str| v.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let mut disks = vec![];
        for block in reply.as_array().into_iter().flatten() {
            let Some(inserted) = block.get("inserted") else { continue };
            let mut problem = None;
            let image = Image::read(inserted.get("image").unwrap_or(&Value::Null), &mut problem);
            disks.push(LiveDisk {
                device: text(block, "device"),
                qdev: text(block, "qdev"),
                node: text(inserted, "node-name"),
                read_only: inserted.get("ro").and_then(Value::as_bool).unwrap_or(false),
                image,
                problem,
            });
        }
        disks
    }
}

impl Image {
    /// Parses an image; stores the first reason against the chain in `problem`.
    fn read(value: &Value, problem: &mut Option<String>) -> Image {
        let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
        let (path, format) = (text("filename"), text("format"));
        let format = if format == "file" { "raw" } else { format };
        let scheme = path.split_once(':').filter(|_| !path.starts_with('/')).map(|(scheme, _)| scheme);
        let backing = value.get("backing-image");
        let found = match (path, scheme) {
            ("", _) => Some("QEMU does not report its image".into()),
            (_, Some("json")) => {
                Some(format!("QEMU describes its image by options instead of one path ({path})"))
            }
            (_, Some(scheme)) => Some(format!("{path} is not a local file (protocol {scheme})")),
            _ if path.starts_with("/dev/") => Some(format!("{path} is a raw host disk")),
            _ if !matches!(format, "qcow2" | "raw") => {
                Some(format!("{path} has format {format}, expected qcow2 or raw"))
            }
            _ if value.get("encrypted").and_then(Value::as_bool) == Some(true) => {
                Some(format!("{path} is encrypted"))
            }
            _ if value.pointer("/format-specific/data/data-file").is_some() => {
                Some(format!("{path} has an external data file"))
            }
            _ if backing.is_none() && value.get("backing-filename").is_some() => {
                Some(format!("{path}: QEMU does not report its backing image"))
            }
            _ => None,
        };
        if problem.is_none() {
            *problem = found;
        }
        Image {
            path: path.into(),
            format: format.into(),
            size: value.get("virtual-size").and_then(Value::as_u64).unwrap_or(0),
            backing: backing.map(|backing| Box::new(Image::read(backing, problem))),
        }
    }

    /// Returns the backing chain, beginning with this image.
    pub fn chain(&self) -> impl Iterator<Item = &Image> {
        std::iter::successors(Some(self), |image| image.backing.as_deref())
    }

    /// Returns the chain as a block node description for qemu-img's `json:` syntax; `place` maps each path.
    ///
    /// The description states every format and backing file, so that qemu-img takes neither from image headers, which
    /// the guest of a raw image can forge.
    ///
    /// # Errors
    /// Returns the errors of `place`.
    pub fn to_json(&self, place: &dyn Fn(&Path) -> Result<PathBuf>) -> Result<Value> {
        let mut all = json!({
            "driver": self.format,
            "file": {"driver": "file", "filename": place(&self.path)?},
        });
        if self.format == "qcow2" {
            let backing = self.backing.as_ref().map(|backing| backing.to_json(place)).transpose()?;
            all["backing"] = backing.unwrap_or(Value::Null);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(image: Value) -> Value {
        json!([{"device": "virtio0", "qdev": "", "inserted": {"node-name": "#b1", "ro": false, "image": image}},
               {"device": "cd0", "removable": true}])
    }

    #[test]
    fn parses_a_backing_chain_and_describes_it_for_qemu_img() {
        let base = json!({"filename": "/b.raw", "format": "raw", "virtual-size": 512});
        let top =
            json!({"filename": "/t.qcow2", "format": "qcow2", "virtual-size": 1024, "backing-image": base});
        let disks = LiveDisk::from_query_block(&block(top));
        assert_eq!(disks[0].problem, None);
        assert_eq!((disks.len(), disks[0].image.chain().count()), (1, 2));
        let words = disks[0]
            .image
            .to_json(&|path| Ok(Path::new("/root").join(path.strip_prefix("/").unwrap())))
            .unwrap();
        assert_eq!(words["backing"]["file"]["filename"], "/root/b.raw");
        assert_eq!(words["driver"], "qcow2");
        assert!(words["backing"].get("backing").is_none(), "a raw image has none");
    }

    #[test]
    fn names_images_that_are_not_local_plain_files() {
        for (image, words) in [
            (
                json!({"filename": "nbd://h/x", "format": "raw", "virtual-size": 1}),
                "is not a local file (protocol nbd)",
            ),
            (json!({"filename": "/x", "format": "vmdk", "virtual-size": 1}), "vmdk"),
            (json!({"filename": "json:{}", "format": "raw", "virtual-size": 1}), "instead of one path"),
            (json!({"filename": "/x", "format": "qcow2", "virtual-size": 1, "encrypted": true}), "encrypted"),
            (
                json!({"filename": "/x", "format": "qcow2", "virtual-size": 1, "backing-filename": "/y"}),
                "does not report its backing image",
            ),
            (
                json!({"filename": "/x", "format": "qcow2", "virtual-size": 1,
                       "backing-image": {"filename": "/dev/sda", "format": "raw", "virtual-size": 1}}),
                "/dev/sda is a raw host disk",
            ),
            (json!({}), "does not report its image"),
        ] {
            let problem = LiveDisk::from_query_block(&block(image)).remove(0).problem.unwrap();
            assert!(problem.contains(words), "{problem}");
        }
    }
}
