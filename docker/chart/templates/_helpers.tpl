{{/* The name of everything. */}}
{{- define "llm2vec.name" -}}
{{- ternary .Release.Name (printf "%s-llm2vec" .Release.Name) (contains "llm2vec" .Release.Name) | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "llm2vec.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "llm2vec.labels" -}}
{{ include "llm2vec.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* The Secret that holds one of the keys, or nothing: (dict "root" $ "of" .Values.metricsKey "given" value) */}}
{{- define "llm2vec.secret" -}}
{{- if .of.existingSecret }}{{ .of.existingSecret }}{{ else if .given }}{{ include "llm2vec.name" .root }}{{ end }}
{{- end }}
