//! A stream of templates: `front | (policy | image) × templates | (entry | record) × blocks | hash`.
//!
//! The front lists the content; the hash at the end covers all bytes before it.

use std::collections::HashSet;

use super::fields::{Fields, Invalid, Preamble, in_header, seal, unseal};
use super::pack::IndexEntry;
use crate::store::{Digest, TagName};

/// The first 8 bytes of every stream.
pub const MAGIC: &[u8; 8] = b"STNCLSAV";

const FIXED: usize = Preamble::LEN + 24;
const TEMPLATE: usize = 48;
const TAG: usize = 4;

/// Maximum length of a front in bytes; a front at all limits below fits.
pub const MAX_FRONT: u32 = 8 << 20;

/// Maximum number of templates in a stream, and of base templates whose blocks are left out.
pub const MAX_TEMPLATES: usize = 4096;

/// Maximum number of tags of all templates in a stream. A loader holds the names lock while it sets them.
pub const MAX_TAGS: usize = 16 << 10;

/// One template in the front.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamTemplate {
    /// Digest of the template: the hash of its image.
    pub digest: Digest,
    /// Length of the image in bytes.
    pub image_length: u64,
    /// Length of the policy in bytes.
    pub policy_length: u32,
    /// Tags that point at the template.
    pub tags: Vec<TagName>,
}

/// The front of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamFront {
    /// The templates, each once.
    pub templates: Vec<StreamTemplate>,
    /// Base templates, whose blocks are left out of the stream.
    pub without: Vec<Digest>,
    /// Number of blocks after the images.
    pub blocks: u64,
}

impl StreamFront {
    /// Encodes the front.
    ///
    /// # Errors
    /// Returns [`Invalid`] if the front exceeds the limits of a reader.
    pub fn encode(&self) -> Result<Vec<u8>, Invalid> {
        let tags = |t: &StreamTemplate| -> usize {
            t.tags.iter().map(|tag| TAG + tag.name().len() + tag.tag().len()).sum()
        };
        let length = FIXED
            + self.templates.iter().map(|t| TEMPLATE + tags(t)).sum::<usize>()
            + self.without.len() * Digest::LEN
            + 32;
        if length > MAX_FRONT as usize
            || self.templates.len() > MAX_TEMPLATES
            || self.without.len() > MAX_TEMPLATES
            || self.templates.iter().map(|t| t.tags.len()).sum::<usize>() > MAX_TAGS
        {
            return Err(Invalid::damage("the header exceeds the limits of a stream"));
        }
        let mut out = Vec::with_capacity(length);
        Preamble::plain(length).encode(MAGIC, &mut out);
        out.extend_from_slice(&in_header(self.templates.len()).to_le_bytes());
        out.extend_from_slice(&in_header(self.without.len()).to_le_bytes());
        out.extend_from_slice(&self.blocks.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        for template in &self.templates {
            out.extend_from_slice(template.digest.bytes());
            out.extend_from_slice(&template.image_length.to_le_bytes());
            out.extend_from_slice(&template.policy_length.to_le_bytes());
            out.extend_from_slice(&in_header(template.tags.len()).to_le_bytes());
            for tag in &template.tags {
                for part in [tag.name(), tag.tag()] {
                    #[expect(clippy::cast_possible_truncation, reason = "a name has at most 128 bytes")]
                    out.extend_from_slice(&(part.len() as u16).to_le_bytes());
                    out.extend_from_slice(part.as_bytes());
                }
            }
        }
        for digest in &self.without {
            out.extend_from_slice(digest.bytes());
        }
        seal(&mut out);
        Ok(out)
    }

    /// Returns the length of a front from its first bytes (at least [`Preamble::LEN`]).
    ///
    /// # Errors
    /// Returns [`Invalid`] if the bytes are not the start of a stream.
    pub fn peek(bytes: &[u8]) -> Result<u32, Invalid> {
        match Preamble::header_length(MAGIC, bytes)? {
            length if (length as usize) < FIXED + TEMPLATE + 32 || length > MAX_FRONT => {
                Err(Invalid::damage(format!("impossible header length {length}")))
            }
            length => Ok(length),
        }
    }

    /// Decodes a front from its bytes, whose number is the value of [`StreamFront::peek`].
    ///
    /// # Errors
    /// Returns [`Invalid`] if the bytes are not a front of this version.
    pub fn decode(bytes: &[u8]) -> Result<StreamFront, Invalid> {
        let mut fields = Fields(unseal(bytes)?);
        Preamble::decode(MAGIC, &mut fields)?;
        let (templates, without) = (fields.u32()? as usize, fields.u32()? as usize);
        let mut front = StreamFront { templates: Vec::new(), without: Vec::new(), blocks: fields.u64()? };
        fields.reserved(8)?;
        if templates == 0 || templates > MAX_TEMPLATES || without > MAX_TEMPLATES {
            return Err(Invalid::damage(format!(
                "invalid number of templates ({templates}) or base templates ({without})"
            )));
        }
        let (mut digests, mut names) = (HashSet::new(), HashSet::new());
        for _ in 0..templates {
            let digest = Digest::new(fields.array()?);
            let (image_length, policy_length) = (fields.u64()?, fields.u32()?);
            if !digests.insert(digest) {
                return Err(Invalid::damage(format!("template {digest} is listed twice")));
            }
            let mut tags = Vec::new();
            for _ in 0..fields.u32()? {
                let (name, tag) = (text(&mut fields)?, text(&mut fields)?);
                let tag = TagName::new(name, tag).map_err(|e| Invalid::damage(e.message()))?;
                if names.len() == MAX_TAGS || !names.insert(tag.clone()) {
                    return Err(Invalid::damage(format!(
                        "tag {tag} is listed twice, or exceeds the limit of {MAX_TAGS} tags"
                    )));
                }
                tags.push(tag);
            }
            front.templates.push(StreamTemplate { digest, image_length, policy_length, tags });
        }
        for _ in 0..without {
            front.without.push(Digest::new(fields.array()?));
        }
        fields.end()?;
        Ok(front)
    }
}

fn text<'a>(fields: &mut Fields<'a>) -> Result<&'a str, Invalid> {
    let length = u16::from_le_bytes(fields.array()?);
    std::str::from_utf8(fields.bytes(length.into())?).map_err(|_| Invalid::damage("a tag is not valid UTF-8"))
}

/// Decodes the entry before a record: an entry of a pack's index with the offset 0.
///
/// # Errors
/// Returns [`Invalid`] if a field has an impossible value.
pub fn decode_entry(bytes: &[u8]) -> Result<IndexEntry, Invalid> {
    let entry = IndexEntry::decode(bytes)?;
    match entry.stored.offset {
        0 => Ok(entry),
        offset => Err(Invalid::damage(format!("invalid record offset {offset} in a stream, expected 0"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn front() -> StreamFront {
        let template = |seed: &[u8], tags: &[&str]| StreamTemplate {
            digest: Digest::of(seed),
            image_length: 1000,
            policy_length: 77,
            tags: tags.iter().map(|t| t.parse().unwrap()).collect(),
        };
        StreamFront {
            templates: vec![template(b"a", &["web:1", "web:2"]), template(b"b", &[])],
            without: vec![Digest::of(b"c")],
            blocks: 9,
        }
    }

    #[test]
    fn round_trips_a_front_and_detects_flipped_bits_and_truncation() {
        let bytes = front().encode().unwrap();
        assert_eq!(StreamFront::peek(&bytes).unwrap() as usize, bytes.len());
        assert_eq!(StreamFront::decode(&bytes).unwrap(), front());
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(StreamFront::decode(&bytes).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(StreamFront::decode(&bytes[..length]).is_err(), "length {length}");
        }
    }

    /// The changed fronts have a valid checksum.
    #[test]
    fn rejects_changed_fields_or_decodes_them_uniquely() {
        let bytes = front().encode().unwrap();
        let body = bytes.len() - 32;
        let mut accepted = 0;
        for at in Preamble::LEN..body {
            for value in [0, 1, 2, 0x2e, 0x7f, 0xff] {
                let mut bad = bytes[..body].to_vec();
                bad[at] = value;
                seal(&mut bad);
                if let Ok(front) = StreamFront::decode(&bad) {
                    accepted += 1;
                    assert_eq!(front.encode().unwrap(), bad, "byte {at} = {value}: two encodings");
                }
            }
        }
        assert!(accepted > 0);
    }

    #[test]
    fn accepts_a_front_at_all_limits() {
        let name = "n".repeat(128);
        let template = |number: usize| StreamTemplate {
            digest: Digest::of(&number.to_le_bytes()),
            image_length: 1,
            policy_length: 1,
            tags: (0..MAX_TAGS / MAX_TEMPLATES)
                .map(|tag| TagName::new(&name, &format!("{number:064}{tag:064}")).unwrap())
                .collect(),
        };
        let mut front = StreamFront {
            templates: (0..MAX_TEMPLATES).map(template).collect(),
            without: vec![Digest::of(b""); MAX_TEMPLATES],
            blocks: 1,
        };
        assert_eq!(StreamFront::decode(&front.encode().unwrap()).unwrap(), front);
        front.templates[0].tags.push("one:more".parse().unwrap());
        assert!(front.encode().is_err());
    }

    #[test]
    fn rejects_duplicates() {
        let is_rejected = |change: &dyn Fn(&mut StreamFront)| {
            let mut front = front();
            change(&mut front);
            StreamFront::decode(&front.encode().unwrap()).is_err()
        };
        assert!(!is_rejected(&|_| {}));
        assert!(is_rejected(&|f| f.templates[1].digest = f.templates[0].digest));
        assert!(is_rejected(&|f| f.templates[1].tags = vec!["web:2".parse().unwrap()]));
        assert!(is_rejected(&|f| f.templates[0].tags.push("web:2".parse().unwrap())));
        assert!(is_rejected(&|f| f.templates.clear()));
    }
}
