//! What is known of the host files behind a VM's disks, from QMP.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::Result;

/// A medium that the VM has now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveDisk {
    /// Name of its block backend: the id of `-drive`; empty with `-blockdev`.
    pub device: String,
    /// Where its device is in QEMU's tree.
    pub qdev: String,
    /// Name of its uppermost block node.
    pub node: String,
    /// True when the guest cannot write to it.
    pub read_only: bool,
    /// Its image and those beneath it.
    pub image: Image,
    /// Why clones cannot have it.
    pub problem: Option<String>,
}

/// One image of a chain, as QEMU has opened it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Where it is, in QEMU's eyes.
    pub path: PathBuf,
    /// `qcow2`, `raw`…
    pub format: String,
    /// Size that the guest sees, in bytes.
    pub size: u64,
    /// What it takes unwritten blocks from.
    pub backing: Option<Box<Image>>,
}

impl LiveDisk {
    /// Those of an answer to `query-block`.
    pub fn all(answer: &Value) -> Vec<LiveDisk> {
        let text = |v: &Value, key: &str| v.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let mut disks = vec![];
        for one in answer.as_array().into_iter().flatten() {
            let Some(inserted) = one.get("inserted") else { continue };
            let mut problem = None;
            let image = Image::read(inserted.get("image").unwrap_or(&Value::Null), &mut problem);
            disks.push(LiveDisk {
                device: text(one, "device"),
                qdev: text(one, "qdev"),
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
    /// Reads one; the first thing against it goes to `problem`.
    fn read(value: &Value, problem: &mut Option<String>) -> Image {
        let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
        let (path, format) = (text("filename"), text("format"));
        let format = if format == "file" { "raw" } else { format };
        let scheme = path.split_once(':').filter(|_| !path.starts_with('/')).map(|(scheme, _)| scheme);
        let backing = value.get("backing-image");
        let found = match (path, scheme) {
            ("", _) => Some("QEMU does not tell its image".into()),
            (_, Some("json")) => Some(format!("its image cannot be named by one path ({path})")),
            (_, Some(scheme)) => Some(format!("{path} is no file of this host but {scheme}")),
            _ if path.starts_with("/dev/") => Some(format!("{path} is a raw disk of the host")),
            _ if !matches!(format, "qcow2" | "raw") => {
                Some(format!("{path} has format {format}; clones can have qcow2 and raw"))
            }
            _ if value.get("encrypted").and_then(Value::as_bool) == Some(true) => {
                Some(format!("{path} is encrypted"))
            }
            _ if value.pointer("/format-specific/data/data-file").is_some() => {
                Some(format!("{path} keeps its data in another file"))
            }
            _ if backing.is_none() && value.get("backing-filename").is_some() => {
                Some(format!("{path}: QEMU does not tell the image beneath it"))
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

    /// The chain from this image down.
    pub fn chain(&self) -> impl Iterator<Item = &Image> {
        std::iter::successors(Some(self), |image| image.backing.as_deref())
    }

    /// The chain in the words of qemu-img, with each path as `place` gives it. Nothing is guessed: neither format
    /// nor backing file is taken from what stands in an image that a guest can write.
    ///
    /// # Errors
    /// Those of `place`.
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
    fn a_chain_is_read_and_given_to_qemu_img() {
        let base = json!({"filename": "/b.raw", "format": "raw", "virtual-size": 512});
        let top =
            json!({"filename": "/t.qcow2", "format": "qcow2", "virtual-size": 1024, "backing-image": base});
        let disks = LiveDisk::all(&block(top));
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
    fn what_is_no_plain_file_is_named() {
        for (image, words) in [
            (json!({"filename": "nbd://h/x", "format": "raw", "virtual-size": 1}), "nbd"),
            (json!({"filename": "/x", "format": "vmdk", "virtual-size": 1}), "vmdk"),
            (json!({"filename": "json:{}", "format": "raw", "virtual-size": 1}), "one path"),
            (json!({"filename": "/x", "format": "qcow2", "virtual-size": 1, "encrypted": true}), "encrypted"),
            (
                json!({"filename": "/x", "format": "qcow2", "virtual-size": 1, "backing-filename": "/y"}),
                "beneath",
            ),
            (
                json!({"filename": "/x", "format": "qcow2", "virtual-size": 1,
                       "backing-image": {"filename": "/dev/sda", "format": "raw", "virtual-size": 1}}),
                "/dev/sda is a raw disk of the host",
            ),
            (json!({}), "does not tell"),
        ] {
            let problem = LiveDisk::all(&block(image)).remove(0).problem.unwrap();
            assert!(problem.contains(words), "{problem}");
        }
    }
}
